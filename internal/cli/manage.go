package cli

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"os/signal"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"

	"github.com/spf13/pflag"

	"github.com/droverproject/drover/daemon"
)

// manageFlags say how a server is managed while it runs.
type manageFlags struct {
	control, metrics, level string
	config                  configFile

	flags *pflag.FlagSet
}

func (m *manageFlags) add(f *pflag.FlagSet, control, config string) {
	m.flags = f
	f.StringVar(&m.config.path, "config", config, "read further flags from `FILE`: lines of NAME = VALUE, without the dashes")
	f.StringVar(&m.control, "control", control, "be managed by 'drover ctl' through a unix socket at `PATH`")
	f.StringVar(&m.metrics, "metrics", "",
		"show metrics to Prometheus at `HOST[:PORT]` (by default at localhost, port "+daemon.DefaultMetricsPort+")")
	f.StringVar(&m.level, "log-level", "info", "`level` of messages: error, warn, info or debug")
}

// manager is how a server is managed.
type manager struct {
	flags *manageFlags
	level *slog.LevelVar
	log   *slog.Logger // set by the server before anything else
	// reloads read again what the server has, and say what has changed.
	reloads  []func() ([]string, error)
	notifier *daemon.Notifier
	ready    atomic.Bool // the service manager was told so
	sealed   string      // why nothing can be read any more, "" if it can

	mu sync.Mutex // held by the reload that runs
}

// start reads the configuration file, and what it and the flags say of logging.
func (m *manageFlags) start() (*manager, error) {
	m.config.may = !m.flags.Changed("config") // a file at the usual place need not be there
	if err := m.config.apply(m.flags); err != nil {
		return nil, err
	}
	level, err := daemon.ParseLogLevel(m.level)
	if err != nil {
		return nil, usagef("--log-level %s: expecting error, warn, info or debug", m.level)
	}
	g := &manager{flags: m, level: new(slog.LevelVar)}
	g.level.Set(level)
	g.reloads = append(g.reloads, g.reloadConfig)
	return g, nil
}

// open opens the control socket and the metrics'. There is a Control even without any.
func (g *manager) open(ctx context.Context, owner *daemon.User) (*daemon.Control, error) {
	return daemon.OpenControl(ctx, daemon.ControlConfig{
		Socket: daemon.Address{Socket: g.flags.control, Owner: owner}, Metrics: g.flags.metrics, Level: g.level,
		Reload: g.reload, Version: version(), Log: g.log,
	})
}

// reload reads everything again. What cannot be read stays as it was, and does not keep the rest from being read.
func (g *manager) reload() (changes []string, err error) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.sealed != "" {
		return nil, errors.New(g.sealed)
	}
	var failed []string
	for _, read := range g.reloads {
		list, err := read()
		changes = append(changes, list...)
		if err != nil {
			failed = append(failed, oneLine(err.Error()))
		}
	}
	for _, c := range changes {
		g.log.Info("reloaded: " + c)
	}
	if failed != nil {
		return changes, fmt.Errorf("reloading: %s", strings.Join(failed, "; "))
	}
	if len(changes) == 0 {
		g.log.Info("reloaded: nothing has changed")
	}
	return changes, nil
}

// reloadConfig takes the log level from the configuration file. Everything else in it is for the next start.
func (g *manager) reloadConfig() ([]string, error) {
	changed, err := g.flags.config.reload(g.flags.flags)
	if err != nil {
		return nil, err
	}
	var out []string
	for _, name := range slices.Sorted(maps.Keys(changed)) {
		v := changed[name]
		if name != "log-level" {
			out = append(out, name+" has changed, which takes effect when the server is started again")
			continue
		}
		text := g.flags.flags.Lookup(name).DefValue
		if len(v) > 0 {
			text = v[len(v)-1]
		}
		level, err := daemon.ParseLogLevel(text)
		if err != nil {
			return out, fmt.Errorf("%s: %w", g.flags.config.path, err)
		}
		g.level.Set(level)
		out = append(out, "log level "+strings.ToLower(level.String()))
	}
	return out, nil
}

// onHangup reloads whenever SIGHUP comes, until the function that it returns is called.
func (g *manager) onHangup() (stop func()) {
	incoming := make(chan os.Signal, 1)
	signal.Notify(incoming, syscall.SIGHUP)
	quit := make(chan struct{})
	var ended sync.WaitGroup
	ended.Go(func() {
		for {
			select {
			case <-quit:
				return
			case <-incoming:
			}
			ready := g.ready.Load()
			if ready {
				g.notify(daemon.Reloading())
			}
			if _, err := g.reload(); err != nil {
				g.log.Error(err.Error())
			}
			if ready {
				g.notify(stateReady)
			}
		}
	})
	return func() {
		signal.Stop(incoming)
		close(quit)
		ended.Wait()
	}
}

// connect finds the service manager, whose absence or failure is no reason to stop.
func (g *manager) connect() {
	var err error
	if g.notifier, err = daemon.NewNotifier(os.Getenv); err != nil {
		g.log.Warn(err.Error())
	}
}

// States that the service manager is told of.
const (
	stateReady    = "READY=1"
	stateStopping = "STOPPING=1"
)

// notify passes a change of state on to the service manager.
func (g *manager) notify(state string) {
	if state == stateReady {
		g.ready.Store(true)
	}
	if err := g.notifier.Tell(state); err != nil {
		g.log.Warn(err.Error())
	}
}

// keyring is the secrets of a server: those of its --object flags, and those in a folder.
type keyring struct {
	objects *objectFlags
	dir     secretsDir

	mu    sync.Mutex
	known secrets
}

func newKeyring(objects *objectFlags, dir string) (*keyring, error) {
	k := &keyring{objects: objects, dir: secretsDir(dir)}
	if dir != "" {
		if err := k.dir.check(); err != nil {
			return nil, err
		}
	}
	_, err := k.reload()
	return k, err
}

// lookup returns a passphrase.
func (k *keyring) lookup(id string) ([]byte, error) {
	k.mu.Lock()
	known := k.known
	k.mu.Unlock()
	if _, ok := known[id]; ok || k.dir == "" {
		return known.lookup(id)
	}
	return k.dir.lookup(id)
}

// reload reads the files of the objects again. Images that are open have what they need of them.
func (k *keyring) reload() (changes []string, err error) {
	now, err := k.objects.parse()
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	if k.known != nil {
		for _, id := range slices.Sorted(maps.Keys(now)) {
			if string(now[id]) != string(k.known[id]) {
				changes = append(changes, "secret "+id+" is another")
			}
		}
	}
	k.known = now
	return changes, nil
}
