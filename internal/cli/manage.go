package cli

import (
	"context"
	"log/slog"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/daemon"
)

// manageFlags say how a server is managed while it runs.
type manageFlags struct {
	logFlags
	control, metrics string
}

func (m *manageFlags) add(f *pflag.FlagSet, control string) {
	f.StringVar(&m.control, "control", control, "be managed by 'drover ctl' through a unix socket at `PATH`")
	f.StringVar(&m.metrics, "metrics", "",
		"show metrics to Prometheus at `HOST[:PORT]` (by default at localhost, port "+daemon.DefaultMetricsPort+")")
	m.logFlags.add(f)
}

// open opens the sockets; there is a Control even without any.
func (m *manageFlags) open(ctx context.Context, level *slog.LevelVar, owner *daemon.User, log *slog.Logger, reload func() ([]string, error)) (*daemon.Control, error) {
	return daemon.OpenControl(ctx, daemon.ControlConfig{
		Socket: daemon.Address{Socket: m.control, Owner: owner}, Metrics: m.metrics, Level: level, Reload: reload, Version: version(), Log: log,
	})
}

// reload reads again what can change.
func (s *server) reload() ([]string, error) { return nil, nil }
