"""What must not be lost: the database and the store of content-addressed bytes."""
