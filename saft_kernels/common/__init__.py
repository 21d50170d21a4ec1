"""What every part uses and none owns: names, files, memory, the log, the pause of gradient release."""
