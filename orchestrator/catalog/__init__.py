"""What has a name: our own declarations, by kind, as plain data. Packages declare more (orchestrator.registry)."""
