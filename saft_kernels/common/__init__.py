"""What every part uses and none owns: names, files, memory, the pause of gradient release."""
