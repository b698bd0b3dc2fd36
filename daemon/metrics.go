package daemon

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"net/http"
	"runtime"
	"strings"
	"time"

	dto "github.com/prometheus/client_model/go"
	"github.com/prometheus/common/expfmt"
)

// maxScrapes is how many requests for metrics are answered at a time.
const maxScrapes = 4

// metricsHandler answers in the text format of Prometheus with what look sees at that moment. Of Prometheus' libraries it takes
// the format alone: those that collect would cost every run of the program more to start than the rest of it, whether
// anybody asks for metrics or not.
func metricsHandler(look func() (ServerStatus, []DiskStatus)) http.Handler {
	scrapes := make(chan struct{}, maxScrapes)
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		select {
		case scrapes <- struct{}{}:
			defer func() { <-scrapes }()
		default:
			http.Error(w, "too many requests for metrics at once", http.StatusServiceUnavailable)
			return
		}
		var text bytes.Buffer
		if err := writeMetrics(&text, look); err != nil {
			http.Error(w, err.Error(), http.StatusInternalServerError)
			return
		}
		w.Header().Set("Content-Type", string(expfmt.NewFormat(expfmt.TypeTextPlain)))
		_, _ = w.Write(text.Bytes()) // whoever asked may be gone
	})
}

// diskMetric is one number of each disk.
type diskMetric struct {
	kind       dto.MetricType
	name, help string
	value      func(*DiskStatus) float64
}

func one(yes bool) float64 {
	if yes {
		return 1
	}
	return 0
}

// diskMetrics lists them. Those of requests begin anew when a disk does.
func diskMetrics() []diskMetric {
	const counter, gauge = dto.MetricType_COUNTER, dto.MetricType_GAUGE
	return []diskMetric{
		{gauge, "up", "1 if the disk is served, 0 if it could not be opened.",
			func(d *DiskStatus) float64 { return one(d.State == StateServing) }},
		{gauge, "size_bytes", "The length of the disk.", func(d *DiskStatus) float64 { return float64(d.Size) }},
		{gauge, "read_only", "1 if clients can change nothing.", func(d *DiskStatus) float64 { return one(d.ReadOnly) }},
		{gauge, "clients", "Connections that use the disk or one of its snapshots.",
			func(d *DiskStatus) float64 { return float64(d.Clients) }},
		{gauge, "in_flight", "Requests under way.", func(d *DiskStatus) float64 { return float64(d.IO.Inflight) }},
		{counter, "requests_total", "Requests of every kind.", func(d *DiskStatus) float64 { return float64(d.IO.Requests) }},
		{counter, "reads_total", "Read requests.", func(d *DiskStatus) float64 { return float64(d.IO.Reads) }},
		{counter, "writes_total", "Write requests.", func(d *DiskStatus) float64 { return float64(d.IO.Writes) }},
		{counter, "flushes_total", "Flush requests.", func(d *DiskStatus) float64 { return float64(d.IO.Flushes) }},
		{counter, "discards_total", "Requests that give space back or zero.",
			func(d *DiskStatus) float64 { return float64(d.IO.Discards) }},
		{counter, "read_bytes_total", "Bytes read.", func(d *DiskStatus) float64 { return float64(d.IO.BytesRead) }},
		{counter, "written_bytes_total", "Bytes written.", func(d *DiskStatus) float64 { return float64(d.IO.BytesWritten) }},
		{counter, "errors_total", "Requests that the image failed.", func(d *DiskStatus) float64 { return float64(d.IO.Errors) }},
		{gauge, "cache_bytes", "Memory that the image's metadata takes.", func(d *DiskStatus) float64 { return float64(d.CacheBytes) }},
		{gauge, "cluster_cache_bytes", "Memory that decompressed clusters take.",
			func(d *DiskStatus) float64 { return float64(d.ClusterCacheBytes) }},
		{gauge, "snapshots", "Snapshots inside the image.", func(d *DiskStatus) float64 { return float64(d.SnapshotCount) }},
		{gauge, "bitmaps", "Dirty bitmaps inside the image.", func(d *DiskStatus) float64 { return float64(d.BitmapCount) }},
		{gauge, "unflushed", "1 if there are changes that a power cut could take back.",
			func(d *DiskStatus) float64 { return one(d.Unflushed) }},
		{gauge, "dirty", "1 if the image would be repaired when it is opened after a sudden end of the server.",
			func(d *DiskStatus) float64 { return one(d.Dirty) }},
		{gauge, "corrupt", "1 if the image was found damaged and takes no changes any more.",
			func(d *DiskStatus) float64 { return one(d.Corrupt != "") }},
	}
}

// writeMetrics writes them all.
func writeMetrics(w *bytes.Buffer, look func() (ServerStatus, []DiskStatus)) error {
	server, disks := look()
	list := []*dto.MetricFamily{
		gauge("drover_info", "What the server is.", 1, "kind", server.Kind, "version", server.Version),
		gauge("drover_disks", "Disks that are served.", float64(server.Disks)),
		gauge("drover_clients", "Connections that use a disk.", float64(server.Clients)),
		gauge("drover_cache_bytes", "Memory that the metadata of all images takes.", float64(server.CacheBytes)),
		gauge("drover_cache_limit_bytes", "How much that may be.", float64(server.CacheLimit)),
		gauge("drover_start_time_seconds", "When the server was started, in seconds since 1970.", float64(server.Started.Unix())),
	}
	for _, m := range diskMetrics() {
		f := family(m.kind, "drover_disk_"+m.name, m.help)
		for i := range disks {
			d := &disks[i]
			f.Metric = append(f.Metric, sample(m.kind, m.value(d), "disk", d.Name, "hba", d.HBA, "image", d.Image))
		}
		list = append(list, f)
	}
	for _, f := range append(list, runtimeMetrics()...) {
		if len(f.Metric) == 0 {
			continue // of no disk
		}
		if _, err := expfmt.MetricFamilyToText(w, f); err != nil {
			return fmt.Errorf("metric %s: %w", f.GetName(), err)
		}
	}
	return nil
}

// runtimeMetrics are those of the program itself that show whether it leaks, under the names that all programs in Go have.
func runtimeMetrics() []*dto.MetricFamily {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	threads, _ := runtime.ThreadCreateProfile(nil)
	return []*dto.MetricFamily{
		gauge("go_info", "The version of Go.", 1, "version", runtime.Version()),
		gauge("go_goroutines", "Goroutines that there are.", float64(runtime.NumGoroutine())),
		gauge("go_threads", "Threads that were made.", float64(threads)),
		gauge("go_memstats_alloc_bytes", "Bytes of objects, in use or not yet swept.", float64(m.Alloc)),
		family(dto.MetricType_COUNTER, "go_memstats_alloc_bytes_total", "Bytes of all objects that there ever were.",
			sample(dto.MetricType_COUNTER, float64(m.TotalAlloc))),
		gauge("go_memstats_heap_inuse_bytes", "Bytes of spans with objects.", float64(m.HeapInuse)),
		gauge("go_memstats_heap_idle_bytes", "Bytes of spans without objects.", float64(m.HeapIdle)),
		gauge("go_memstats_heap_released_bytes", "Those of them that the system has back.", float64(m.HeapReleased)),
		gauge("go_memstats_stack_inuse_bytes", "Bytes of stacks.", float64(m.StackInuse)),
		gauge("go_memstats_sys_bytes", "Bytes from the system.", float64(m.Sys)),
		gauge("go_memstats_next_gc_bytes", "The heap at which garbage is collected next.", float64(m.NextGC)),
		gauge("go_memstats_last_gc_time_seconds", "When it was last, in seconds since 1970.", float64(m.LastGC)/1e9),
	}
}

// gauge is a family of one number that goes up and down.
func gauge(name, help string, v float64, labels ...string) *dto.MetricFamily {
	return family(dto.MetricType_GAUGE, name, help, sample(dto.MetricType_GAUGE, v, labels...))
}

func family(kind dto.MetricType, name, help string, samples ...*dto.Metric) *dto.MetricFamily {
	return &dto.MetricFamily{Name: &name, Help: &help, Type: &kind, Metric: samples}
}

// sample is a number with labels, given as name and value in turn.
func sample(kind dto.MetricType, v float64, labels ...string) *dto.Metric {
	m := new(dto.Metric)
	if kind == dto.MetricType_COUNTER {
		m.Counter = &dto.Counter{Value: &v}
	} else {
		m.Gauge = &dto.Gauge{Value: &v}
	}
	for ; len(labels) > 1; labels = labels[2:] {
		name, value := labels[0], text(labels[1])
		m.Label = append(m.Label, &dto.LabelPair{Name: &name, Value: &value})
	}
	return m
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
