"""The chunkserver: chunk files on disks, the data port, the links to the masters."""
