"""The run: reads, calibrates, quantizes, writes and frees one transformer layer after another."""
