"""What people and scripts meet: arguments, commands, output, progress displays, batch scripts."""
