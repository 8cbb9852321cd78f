//! Compiles the protocol with protox, so that no protoc is needed.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo::rerun-if-changed=sidecar.proto");
    let files = protox::compile(["sidecar.proto"], ["."])?;
    tonic_prost_build::configure()
        .build_client(std::env::var_os("CARGO_FEATURE_CLIENT").is_some())
        .build_server(std::env::var_os("CARGO_FEATURE_SERVER").is_some())
        .bytes(".remuda.sidecar.v1")
        .compile_fds(files)?;
    Ok(())
}
