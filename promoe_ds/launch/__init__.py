"""Jobs on several hosts: pre-flight, launch, heartbeat, diagnosis, restarts. Imports no torch."""
