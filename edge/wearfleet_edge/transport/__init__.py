"""The two ways to the cloud: telemetry over MQTT, everything else over gRPC."""
