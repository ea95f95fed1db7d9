"""The chunkserver: copies of chunks on disks, the data port, and the links to the masters."""
