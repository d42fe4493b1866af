"""The agent on the device: streams, recognises, learns; imports neither torch nor anything of the cloud."""
