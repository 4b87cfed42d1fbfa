"""The Open Inference Protocol (KServe's V2) with Triton's extensions: tensors, requests, responses, metadata.

Knows the protocol and nothing of queues or sockets; ``service.routes.v2`` puts it on paths.
"""
