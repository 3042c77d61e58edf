"""Conversations: read from files of many layouts, rendered by a chat template."""
