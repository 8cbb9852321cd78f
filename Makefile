# The thin front of `cargo xtask`: see `cargo xtask help`.
XTASK := sh deploy/setup.sh && cargo xtask

.PHONY: setup build demo test faults bench generate lint docs ci clean
setup:    ; $(XTASK) setup $(ARGS)
build:    ; $(XTASK) build $(ARGS)
demo:     ; $(XTASK) demo $(ARGS)
test:     ; $(XTASK) test $(ARGS)
faults:   ; $(XTASK) faults $(ARGS)
bench:    ; $(XTASK) bench $(ARGS)
generate: ; $(XTASK) generate $(ARGS)
lint:     ; $(XTASK) lint $(ARGS)
docs:     ; $(XTASK) docs $(ARGS)
ci:       ; $(XTASK) ci $(ARGS)
clean:    ; $(XTASK) clean $(ARGS)
