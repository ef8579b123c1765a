"""Dense linear algebra on one process or many, and load-balanced assignment of SVDs to ranks."""
