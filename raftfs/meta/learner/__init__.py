"""The learner: it follows the log without a vote, and keeps images and changelogs of it."""
