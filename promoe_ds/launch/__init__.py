"""The launching host's side: hosts, ssh, environment, pre-flight, lease, restarts. Imports no torch."""
