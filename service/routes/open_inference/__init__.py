"""The Open Inference Protocol (KServe's V2) with Triton's extensions: tensors, requests, responses, metadata, compression.

Knows the protocol's objects, and neither paths nor the engine; ``service.routes.open_inference.routes`` brings them together.
"""
