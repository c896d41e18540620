# The image: one static tree with the program, the C library that it was linked with, and the certificates to trust.
# There is no shell and no package manager in it, and nothing that it would have to write.

# Pin by digest where the registry is not trusted to keep a tag: --build-arg RUST_IMAGE=…@sha256:…
ARG RUST_IMAGE=docker.io/library/rust:1.95.0-slim-bookworm

FROM ${RUST_IMAGE} AS build
WORKDIR /build

# The dependencies alone, with empty sources: this layer lasts until Cargo.lock changes. Benches, tests and examples
# are not in the build context, so their sections are taken out.
COPY Cargo.toml Cargo.lock ./
RUN sed -i -E '/^\[\[(bench|test|example)\]\]/,/^$/d' Cargo.toml \
    && mkdir src \
    && echo 'fn main() {}' > src/main.rs \
    && touch src/lib.rs \
    && cargo build --release --locked --bin cache-aside

# Cargo compares times, and files that are copied keep theirs: without the touch it would take the empty sources'
# result for this one's.
COPY src src
RUN touch src/main.rs src/lib.rs \
    && cargo build --release --locked --bin cache-aside

# The tree of the final image: the program, what the loader needs for it, certificates, a name for the user, and where other
# names are looked up.
RUN mkdir -p /tree/etc /tree/usr/local/bin \
    && cp target/release/cache-aside /tree/usr/local/bin/ \
    && ldd target/release/cache-aside > linked \
    && grep -oE '/[^ ]+' linked > libraries \
    && xargs -a libraries cp -L --parents -t /tree \
    && cp -L --parents /etc/ssl/certs/ca-certificates.crt /tree \
    && echo 'cache-aside:x:65532:65532::/:/sbin/nologin' > /tree/etc/passwd \
    && echo 'cache-aside:x:65532:' > /tree/etc/group \
    && echo 'hosts: files dns' > /tree/etc/nsswitch.conf

FROM scratch
COPY --from=build /tree /

ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="cache-aside" \
      org.opencontainers.image.description="A cache between applications and their database, as a service" \
      org.opencontainers.image.source="https://github.com/cache-aside/cache-aside" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"

# A number, so that Kubernetes can see that it is not root. Any other number does as well: no file belongs to it.
USER 65532:65532
EXPOSE 8080 9090

# SIGTERM begins the drain: unready first, then no new connections, then the end of what is under way.
STOPSIGNAL SIGTERM

# Health is asked over HTTP, by /livez and /readyz; there is no program in here that a HEALTHCHECK could run.
ENTRYPOINT ["/usr/local/bin/cache-aside"]
CMD ["serve"]
