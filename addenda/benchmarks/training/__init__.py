"""What learning a task costs, in time and in memory."""
