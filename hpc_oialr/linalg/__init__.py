"""Dense linear algebra on one process or many, and the plan that deals it out."""
