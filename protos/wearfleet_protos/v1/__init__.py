"""Version 1 of the schemas: generated code, imported only by codec.py and the gRPC services."""
