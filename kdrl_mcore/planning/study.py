def run_study(a,b): return []
