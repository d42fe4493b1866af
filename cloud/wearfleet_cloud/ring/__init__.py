"""A ring of federations: each site takes its turn of MetaFed by a federation among its own devices."""
