"""What archives hold: members and where their bytes lie."""
