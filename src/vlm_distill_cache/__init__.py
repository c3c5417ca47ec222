"""Run a large vision-language teacher once, cache what a student needs, distil without the teacher."""
