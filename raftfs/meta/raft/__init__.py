"""Consensus: pysyncobj made safe, its durable journal, snapshots, identities, the asyncio driver.
"""
