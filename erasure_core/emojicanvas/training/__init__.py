"""How EmojiCanvas was made: its data, its networks and its judge."""
