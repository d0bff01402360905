"""Load on a running Pressroom: streaming and grounded chat, by users or by arrivals, measured from outside.

locustfile.py is the glue to Locust; every other module is plain Python, which knows neither Locust nor gevent.
"""
