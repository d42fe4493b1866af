"""The contract between cloud and edge: schemas, documents, windowing. NumPy and protobuf only."""
