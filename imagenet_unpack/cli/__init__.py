"""The command line: arguments, commands, output, progress displays, batch scripts, the report page."""
