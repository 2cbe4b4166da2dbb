"""Who may take part: the run's authority, its members, and what each may call."""
