"""A small Azure on loopback, against which the unmodified Azure SDK and DVC run.

cloud.py         puts it together: certificates, relay, Azurite, service, machine; start reading here
relay.py         HTTPS_PROXY of the tests: maps Azure's hosts to loopback, refuses and notes all others
certificates.py  a certificate authority that lives as long as the tests
service.py       sign-in, ARM and the data plane of one workspace and one registry
endpoints.py     managed online endpoints: deployments, traffic, logs; sizes, quota and roles
nodes.py         runs a deployment's container for real, as a process with what was sent and mounted
machine.py       runs a submitted job for real, in a home and an environment of its own
"""
