"""What people look at: pictures while a run samples, and reports of runs. Nothing below the command line knows it."""
