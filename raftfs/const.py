"""Limits, sizes and ports: every bound of the system, each with its reason.

Ground floor: imports nothing from raftfs.
"""

KIB = 1024
MIB = 1024 * KIB

# --- files and chunks -------------------------------------------------------------------------
CHUNK_SIZE = 64 * MIB  # the family's chunk: 63 MiB is one chunk, 65 MiB are two
BLOCK_SIZE = 64 * KIB  # unit of the CRC table
BLOCKS_PER_CHUNK = CHUNK_SIZE // BLOCK_SIZE
CHUNK_INDEX_MAX = 2**31 - 1
FILE_LENGTH_MAX = 2**31 * CHUNK_SIZE  # 128 PiB, as the family documents; beyond it EFBIG
NAME_MAX = 255
SYMLINK_MAX = 4095
ROOT_INODE = 1
GOAL_MIN, GOAL_MAX, GOAL_DEFAULT = 1, 9, 2
LINK_MAX = 65_000

# --- ports --------------------------------------------------------------------------------------
PORT_RAFT = 9418
PORT_METALOGGER = 9419
PORT_CHUNKSERVERS = 9420
PORT_CLIENTS = 9421
PORT_CHUNK_DATA = 9422
PORT_WEB = 9425

# --- frames --------------------------------------------------------------------------------------
CONTROL_FRAME_MAX = 8 * MIB  # a 1,000-command batch or a page of readdir is far below it
DATA_HEAD_MAX = 64 * KIB
DATA_PAYLOAD_MAX = 1 * MIB  # measured knee: larger requests gain nothing (fuse notes, section 3)
SEND_QUEUE_MAX = 64 * MIB  # a peer that does not read for so long is disconnected

# --- replicated log -------------------------------------------------------------------------------
BATCH_COMMANDS_MAX = 1_000
BATCH_BYTES_MAX = 1 * MIB
# Of the log behind the last checkpoint, on each master's disk, for learners that were away: at
# 1,000 small operations a second about two hours, at 10 a second a week.
KEPT_LOG_BYTES = 1024 * MIB
# Results that the state keeps for each session; a client never has a number in flight that is this
# much older than its newest one, so a retry always finds its first answer.
SESSION_WINDOW = 1024

# --- sessions
# ---------------------------------------------------------------------------------------
SESSION_SUSTAIN_S = 86_400.0  # open files of a vanished client are kept this long
WRITE_LOCK_GRACE_S = 60.0  # chunk locks of a vanished client fall after this

# --- tickets --------------------------------------------------------------------------------------
# What a client that lost its rights may read on; renewed at half of it, so that a cluster without
# a leader is not noticed by readers for as long.
TICKET_LIFETIME_S = 300.0

# --- chunkservers
# ------------------------------------------------------------------------------------
DISK_LEAVE_FREE = 256 * MIB
ORPHAN_DELAY_S = 7 * 86_400.0  # a copy that no metadata knows is kept this long
HEARTBEAT_S = 1.0
