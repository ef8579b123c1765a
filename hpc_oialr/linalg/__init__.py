"""Dense linear algebra on one process, and the plan that deals it out to many."""
