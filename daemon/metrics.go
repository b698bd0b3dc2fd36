package daemon

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"
)

// metricsHandler answers in the text format of Prometheus with what look sees at that moment.
func metricsHandler(look func() (ServerStatus, []DiskStatus)) http.Handler {
	r := prometheus.NewRegistry()
	r.MustRegister(collector{look}, collectors.NewGoCollector()) // two different ones: neither can fail
	return promhttp.HandlerFor(r, promhttp.HandlerOpts{MaxRequestsInFlight: 4})
}

// collector turns statuses into metrics.
type collector struct {
	look func() (ServerStatus, []DiskStatus)
}

// diskMetric is one number of each disk.
type diskMetric struct {
	desc  *prometheus.Desc
	kind  prometheus.ValueType
	value func(*DiskStatus) float64
}

func newDiskMetric(kind prometheus.ValueType, name, help string, value func(*DiskStatus) float64) diskMetric {
	desc := prometheus.NewDesc("drover_disk_"+name, help, []string{"disk", "hba", "image"}, nil)
	return diskMetric{desc, kind, value}
}

func one(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// diskMetrics lists them. Those of requests begin anew when a disk does.
func diskMetrics() []diskMetric {
	const counter, gauge = prometheus.CounterValue, prometheus.GaugeValue
	return []diskMetric{
		newDiskMetric(gauge, "up", "1 if the disk is served, 0 if it could not be opened.",
			func(d *DiskStatus) float64 { return one(d.State == StateServing) }),
		newDiskMetric(gauge, "size_bytes", "The length of the disk.", func(d *DiskStatus) float64 { return float64(d.Size) }),
		newDiskMetric(gauge, "read_only", "1 if clients can change nothing.", func(d *DiskStatus) float64 { return one(d.ReadOnly) }),
		newDiskMetric(gauge, "clients", "Connections that use the disk or one of its snapshots.",
			func(d *DiskStatus) float64 { return float64(d.Clients) }),
		newDiskMetric(gauge, "in_flight", "Requests under way.", func(d *DiskStatus) float64 { return float64(d.IO.Inflight) }),
		newDiskMetric(counter, "requests_total", "Requests of every kind.", func(d *DiskStatus) float64 { return float64(d.IO.Requests) }),
		newDiskMetric(counter, "reads_total", "Read requests.", func(d *DiskStatus) float64 { return float64(d.IO.Reads) }),
		newDiskMetric(counter, "writes_total", "Write requests.", func(d *DiskStatus) float64 { return float64(d.IO.Writes) }),
		newDiskMetric(counter, "flushes_total", "Flush requests.", func(d *DiskStatus) float64 { return float64(d.IO.Flushes) }),
		newDiskMetric(counter, "discards_total", "Requests that give space back or zero.",
			func(d *DiskStatus) float64 { return float64(d.IO.Discards) }),
		newDiskMetric(counter, "read_bytes_total", "Bytes read.", func(d *DiskStatus) float64 { return float64(d.IO.BytesRead) }),
		newDiskMetric(counter, "written_bytes_total", "Bytes written.", func(d *DiskStatus) float64 { return float64(d.IO.BytesWritten) }),
		newDiskMetric(counter, "errors_total", "Requests that the image failed.", func(d *DiskStatus) float64 { return float64(d.IO.Errors) }),
		newDiskMetric(gauge, "cache_bytes", "Memory that the image's metadata takes.", func(d *DiskStatus) float64 { return float64(d.CacheBytes) }),
		newDiskMetric(gauge, "cluster_cache_bytes", "Memory that decompressed clusters take.",
			func(d *DiskStatus) float64 { return float64(d.ClusterCacheBytes) }),
		newDiskMetric(gauge, "snapshots", "Snapshots inside the image.", func(d *DiskStatus) float64 { return float64(d.SnapshotCount) }),
		newDiskMetric(gauge, "bitmaps", "Dirty bitmaps inside the image.", func(d *DiskStatus) float64 { return float64(d.BitmapCount) }),
		newDiskMetric(gauge, "unflushed", "1 if there are changes that a power cut could take back.",
			func(d *DiskStatus) float64 { return one(d.Unflushed) }),
		newDiskMetric(gauge, "dirty", "1 if the image would be repaired when it is opened after a sudden end of the server.",
			func(d *DiskStatus) float64 { return one(d.Dirty) }),
		newDiskMetric(gauge, "corrupt", "1 if the image was found damaged and takes no changes any more.",
			func(d *DiskStatus) float64 { return one(d.Corrupt != "") }),
	}
}

// Describe implements prometheus.Collector. It says nothing, so that metrics are judged when they are collected.
func (collector) Describe(chan<- *prometheus.Desc) {}

// Collect implements prometheus.Collector.
func (c collector) Collect(out chan<- prometheus.Metric) {
	server, disks := c.look()
	number := func(name, help string, v float64) {
		out <- prometheus.MustNewConstMetric(prometheus.NewDesc("drover_"+name, help, nil, nil), prometheus.GaugeValue, v)
	}
	info := prometheus.NewDesc("drover_info", "What the server is.", []string{"kind", "version"}, nil)
	out <- prometheus.MustNewConstMetric(info, prometheus.GaugeValue, 1, text(server.Kind), text(server.Version))
	number("disks", "Disks that are served.", float64(server.Disks))
	number("clients", "Connections that use a disk.", float64(server.Clients))
	number("cache_bytes", "Memory that the metadata of all images takes.", float64(server.CacheBytes))
	number("cache_limit_bytes", "How much that may be.", float64(server.CacheLimit))
	number("start_time_seconds", "When the server was started, in seconds since 1970.", float64(server.Started.Unix()))
	for _, m := range diskMetrics() {
		for i := range disks {
			d := &disks[i]
			out <- prometheus.MustNewConstMetric(m.desc, m.kind, m.value(d), text(d.Name), text(d.HBA), text(d.Image))
		}
	}
}

// text is what can stand in a label: names of files may be any bytes, and labels are UTF-8.
func text(s string) string { return strings.ToValidUTF8(s, "\uFFFD") }

// DefaultMetricsPort is where /metrics is served when an address has no port.
const DefaultMetricsPort = "9810"

// listenMetrics listens at HOST[:PORT], at the loopback interface when there is no HOST.
func listenMetrics(ctx context.Context, addr string) (net.Listener, error) {
	host, port, err := net.SplitHostPort(addr)
	if err != nil {
		host, port = strings.Trim(addr, "[]"), DefaultMetricsPort
	}
	if host == "" {
		host = "localhost"
	}
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", net.JoinHostPort(host, port))
	if err != nil {
		return nil, fmt.Errorf("metrics: listening on %s: %w", addr, err)
	}
	return l, nil
}

// metricsServer serves nothing but /metrics, to whoever can reach it.
func (k *Control) metricsServer() *http.Server {
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", metricsHandler(k.look))
	return &http.Server{
		Handler: mux, ReadTimeout: controlHeader, WriteTimeout: time.Minute, MaxHeaderBytes: maxControlHeader, ErrorLog: k.errorLog(),
	}
}

// look is what metrics are made of.
func (k *Control) look() (ServerStatus, []DiskStatus) { return k.serverNow(), k.list() }
