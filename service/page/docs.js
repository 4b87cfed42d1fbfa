// The API's document, shown by Swagger UI; addresses are relative, so that the service may be behind a prefix.
// Swagger UI goes from the title (h1) to the groups of operations (h3): a heading between them, for who reads by headings.
const headed = (Operations, { React }) => (properties) =>
  React.createElement("div", null, React.createElement("h2", null, "Operations"), React.createElement(Operations, properties));

SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#api",
  deepLinking: true,
  validatorUrl: null,
  syntaxHighlight: { theme: "obsidian" }, // the usual theme has red on grey, of too little contrast
  plugins: [{ wrapComponents: { operations: headed } }],
});
