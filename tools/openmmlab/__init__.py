"""What ``subquad mm_train`` is made of besides mmengine's Runner."""
