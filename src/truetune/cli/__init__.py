"""The command line: finds the command, imports only that recipe."""
