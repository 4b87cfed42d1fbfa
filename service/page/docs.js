// The API's document, shown by Swagger UI; addresses are relative, so that the service may be behind a prefix.
SwaggerUIBundle({ url: "openapi.json", dom_id: "#api", deepLinking: true, validatorUrl: null });
