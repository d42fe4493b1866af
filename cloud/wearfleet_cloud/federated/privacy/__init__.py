"""What keeps a single client's update from being read off: on the service's side."""
