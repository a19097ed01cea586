"""What a schedule would take: time, memory and messages, without running it."""
