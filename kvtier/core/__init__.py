"""The core: policies' interface, page tables, tiers, sessions."""
