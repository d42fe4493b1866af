"""The cloud side: data, algorithms, training, export, federated rounds, fleet and service."""
