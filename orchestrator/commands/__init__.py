"""What the commands do; `orchestrator.cli` reads the arguments. Each is imported when it is called."""
