//! Configurations of the static API server and of the proxies that Weir is compared with: TLS on both sides, the server verified,
//! connections kept, nothing recorded but Envoy's line a request and what mitmproxy writes.

use std::{net::IpAddr, path::Path};

use serde_json::{Value, json};

/// Where a proxy listens, and what is behind it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports {
    /// The address of both.
    pub(super) host: IpAddr,
    pub(super) proxy: u16,
    pub(super) upstream: u16,
}

/// The frame of both nginx.
fn nginx_frame(folder: &Path, name: &str, http: &str) -> String {
    let folder = folder.display();
    format!(
        "daemon off; master_process off; worker_processes 1; pid {folder}/{name}.pid; error_log {folder}/{name}.error;
worker_rlimit_nofile 20000;
events {{ worker_connections 9000; }}
http {{
  access_log off; keepalive_requests 1000000000; keepalive_timeout 300s; client_max_body_size 8m; client_body_buffer_size 64k;
  client_body_temp_path {folder}/{name}.body; proxy_temp_path {folder}/{name}.proxy; fastcgi_temp_path {folder}/{name}.fastcgi;
  uwsgi_temp_path {folder}/{name}.uwsgi; scgi_temp_path {folder}/{name}.scgi;
  ssl_certificate {folder}/server.crt; ssl_certificate_key {folder}/server.key; ssl_protocols TLSv1.2 TLSv1.3;
  http2_max_concurrent_streams 250;
{http}
}}
"
    )
}

/// The API server's place.
pub(super) fn upstream(folder: &Path, ports: Ports) -> String {
    let (Ports { host, upstream: port, .. }, files) = (ports, folder.display());
    let http = format!(
        "  open_file_cache max=10; default_type application/json;
  server {{
    listen {host}:{port} ssl http2 backlog=4096;
    location = /api/v1/namespaces/shop/pods/web-0 {{ alias {files}/pod.json; }}
    location = /api/v1/pods {{ alias {files}/pods.json; }}
    # A static server refuses a POST, after it has read it.
    location = /api/v1/namespaces/shop/configmaps {{ error_page 405 =201 /created; alias {files}/created.json; }}
    location = /created {{ internal; alias {files}/created.json; }}
  }}"
    );
    nginx_frame(folder, "upstream", &http)
}

/// nginx as a proxy.
pub(super) fn nginx(folder: &Path, ports: Ports) -> String {
    let (Ports { host, proxy, upstream }, files) = (ports, folder.display());
    let http = format!(
        "  upstream api {{ server {host}:{upstream}; keepalive 256; keepalive_requests 1000000000; keepalive_timeout 300s; }}
  server {{
    listen {host}:{proxy} ssl http2 backlog=4096;
    location / {{
      proxy_pass https://api; proxy_http_version 1.1; proxy_set_header Connection \"\"; proxy_set_header Host localhost;
      proxy_ssl_verify on; proxy_ssl_trusted_certificate {files}/ca.crt; proxy_ssl_name localhost; proxy_ssl_server_name on;
      proxy_ssl_protocols TLSv1.2 TLSv1.3; proxy_max_temp_file_size 0;
    }}
  }}"
    );
    nginx_frame(folder, "nginx", &http)
}

/// HAProxy; HTTP/2 goes on as HTTP/2, which is its fastest.
pub(super) fn haproxy(folder: &Path, ports: Ports) -> String {
    let (Ports { host, proxy, upstream }, files) = (ports, folder.display());
    let server = format!(
        "server api {host}:{upstream} ssl verify required ca-file {files}/ca.crt verifyhost localhost sni str(localhost)"
    );
    format!(
        "global
  nbthread 1
  maxconn 9000
defaults
  mode http
  timeout connect 30s
  timeout client 300s
  timeout server 300s
  http-reuse always
frontend all
  bind {host}:{proxy} ssl crt {files}/server.pem alpn h2,http/1.1
  use_backend http2 if {{ ssl_fc_alpn h2 }}
  default_backend http1
backend http1
  {server} alpn http/1.1
backend http2
  {server} alpn h2
"
    )
}

/// Envoy, which goes on in the version that the client speaks.
pub(super) fn envoy(folder: &Path, ports: Ports) -> Value {
    let file = |name: &str| json!({"filename": folder.join(name)});
    let kind = |name: &str| format!("type.googleapis.com/envoy.{name}");
    let address = |port: u16| json!({"socket_address": {"address": ports.host, "port_value": port}});
    let manager = json!({
        "@type": kind("extensions.filters.network.http_connection_manager.v3.HttpConnectionManager"),
        "stat_prefix": "all", "codec_type": "AUTO", "stream_idle_timeout": "0s",
        "access_log": [{"name": "file", "typed_config": {
            "@type": kind("extensions.access_loggers.file.v3.FileAccessLog"), "path": folder.join("envoy.access")}}],
        "http_filters": [{"name": "router",
            "typed_config": {"@type": kind("extensions.filters.http.router.v3.Router")}}],
        "route_config": {"virtual_hosts": [{"name": "all", "domains": ["*"], "routes": [
            {"match": {"prefix": "/"}, "route": {"cluster": "api", "timeout": "0s"}}]}]},
    });
    let served = json!({
        "@type": kind("extensions.transport_sockets.tls.v3.DownstreamTlsContext"),
        "common_tls_context": {
            "alpn_protocols": ["h2", "http/1.1"],
            "tls_certificates": [{"certificate_chain": file("server.crt"), "private_key": file("server.key")}],
        },
    });
    let verified = json!({
        "@type": kind("extensions.transport_sockets.tls.v3.UpstreamTlsContext"), "sni": "localhost",
        "common_tls_context": {"validation_context": {"trusted_ca": file("ca.crt")}},
    });
    let threshold = json!({"max_connections": 20000, "max_pending_requests": 20000, "max_requests": 20000});
    let versions = json!({
        "@type": kind("extensions.upstreams.http.v3.HttpProtocolOptions"),
        "use_downstream_protocol_config": {"http_protocol_options": {}, "http2_protocol_options": {}},
    });
    json!({"static_resources": {
        "listeners": [{
            "name": "all", "address": address(ports.proxy),
            "filter_chains": [{
                "transport_socket": {"name": "tls", "typed_config": served},
                "filters": [{"name": "http", "typed_config": manager}],
            }],
        }],
        "clusters": [{
            "name": "api", "type": "STATIC", "connect_timeout": "10s",
            "circuit_breakers": {"thresholds": [threshold]},
            "typed_extension_protocol_options": {"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": versions},
            "transport_socket": {"name": "tls", "typed_config": verified},
            "load_assignment": {"cluster_name": "api", "endpoints": [{"lb_endpoints": [
                {"endpoint": {"address": address(ports.upstream)}}]}]},
        }],
    }})
}

/// mitmproxy's arguments.
pub(super) fn mitmproxy(folder: &Path, ports: Ports) -> Vec<String> {
    let file = |name: &str| folder.join(name).display().to_string();
    let set = |text: String| ["--set".to_owned(), text];
    let mut arguments = vec!["-q".to_owned(), "-w".to_owned(), file("flows")];
    arguments.extend(["--mode".to_owned(), format!("reverse:https://{}:{}", ports.host, ports.upstream)]);
    arguments.extend(["--listen-host".to_owned(), ports.host.to_string()]);
    arguments.extend(["--listen-port".to_owned(), ports.proxy.to_string()]);
    arguments.extend(["--certs".to_owned(), file("server.pem")]);
    arguments.extend(set(format!("ssl_verify_upstream_trusted_ca={}", file("ca.crt"))));
    arguments.extend(set(format!("confdir={}", file("mitmproxy"))));
    arguments
}
