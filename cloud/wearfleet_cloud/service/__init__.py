"""The cloud service: gRPC, ingest, metrics and the live page in one process."""
