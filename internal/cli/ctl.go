package cli

import (
	"context"
	"net/http"
	"net/url"
	"os"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/daemon"
)

const (
	// defaultControl is where 'drover tcmu' has its control socket.
	defaultControl = "/run/drover/tcmu.sock"
	// controlVariable names another one to 'drover ctl'.
	controlVariable = "DROVER_CONTROL"
)

// controller is one run of ctl.
type controller struct {
	*app
	socket, output string
}

func (a *app) ctlCommand() *cobra.Command {
	c := &controller{app: a}
	cmd := &cobra.Command{
		Use:   "ctl COMMAND [flags]",
		Short: "Manage a running server: snapshots, sizes, bitmaps, exports",
		Long: `Manage a 'drover serve' or 'drover tcmu' that runs, through its control socket.

The socket is --socket, or what the variable ` + controlVariable + ` says, or that of
'drover tcmu': ` + defaultControl + `. A 'drover serve' has one if it was started
with --control. Only root and the user of the server may use it.

NAME is the name of a disk. A server of exports knows one by the name that clients
ask for ("" is the default export) and by its image. Of a server of SCSI disks it
is the name that targetcli shows, or user_N/NAME, or the configuration string.`,
		Example: `  drover ctl list
  drover ctl snapshot create disk0 before-update
  drover ctl resize disk0 +10G
  drover ctl --socket /run/drover/vm1.ctl export add data /images/data.qcow2`,
		Args: cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("Expecting a command: 'drover ctl --help' lists them")
			}
			return usagef("Command not found: ctl %s", args[0])
		},
	}
	f := cmd.PersistentFlags()
	f.StringVar(&c.socket, "socket", "", "`path` of the server's control socket")
	f.StringVar(&c.output, "output", "human", "`format` of the output: human or json")
	cmd.AddCommand(c.listCommand(), c.showCommand(), c.statsCommand(), c.snapshotCommand(), c.resizeCommand(), c.bitmapCommand(),
		c.flushCommand(), c.checkCommand(), c.compactCommand(), c.exportCommand(), c.reloadCommand(), c.logLevelCommand())
	sortNoFlags(cmd)
	return cmd
}

// sortNoFlags has help show flags in the order in which they were added.
func sortNoFlags(cmd *cobra.Command) {
	cmd.Flags().SortFlags = false
	cmd.PersistentFlags().SortFlags = false
	for _, c := range cmd.Commands() {
		sortNoFlags(c)
	}
}

// arguments is the check of a command that takes those named.
func arguments(names ...string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		switch {
		case len(args) < len(names):
			return usagef("Expecting %s", strings.Join(names, " "))
		case len(args) > len(names):
			return usagef("Unexpected argument: %s", args[len(names)])
		}
		return nil
	}
}

// group is a command that has only commands.
func group(use, short, long string, commands ...*cobra.Command) *cobra.Command {
	cmd := &cobra.Command{Use: use + " COMMAND", Short: short, Long: long, Args: cobra.ArbitraryArgs,
		RunE: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return usagef("Expecting a command: 'drover ctl %s --help' lists them", use)
			}
			return usagef("Command not found: ctl %s %s", use, args[0])
		},
	}
	cmd.AddCommand(commands...)
	return cmd
}

// path is the control socket.
func (c *controller) path() string {
	if c.socket != "" {
		return c.socket
	}
	if p := os.Getenv(controlVariable); p != "" {
		return p
	}
	return defaultControl
}

// call sends one request. Errors are one line: scripts log them as they are.
func (c *controller) call(ctx context.Context, method, path string, query url.Values, in, out any) error {
	if err := checkOutput(c.output); err != nil {
		return err
	}
	client := daemon.NewControlClient(c.path())
	defer client.Close()
	if err := client.Call(ctx, method, path, query, in, out); err != nil {
		return errorf("%s", oneLine(err.Error()))
	}
	return nil
}

// oneLine joins the lines of a message.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// named is the query of a request about a disk, with further pairs.
func named(name string, pairs ...string) url.Values {
	q := url.Values{"name": {name}}
	for i := 0; i+1 < len(pairs); i += 2 {
		q.Set(pairs[i], pairs[i+1])
	}
	return q
}

// print prints v as JSON, or has human print it as text.
func (c *controller) print(v any, human func()) error {
	if c.output == "json" {
		return c.printJSON(v)
	}
	human()
	return nil
}

func (c *controller) listCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the disks that are served",
		Args:  arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var list []daemon.DiskStatus
			if err := c.call(cmd.Context(), http.MethodGet, "/v1/disks", nil, nil, &list); err != nil {
				return err
			}
			return c.print(list, func() { c.printList(list) })
		},
	}
}

func (c *controller) showCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "show NAME",
		Short: "Show everything about one disk",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var d daemon.DiskDetails
			if err := c.call(cmd.Context(), http.MethodGet, "/v1/disk", named(args[0]), nil, &d); err != nil {
				return err
			}
			return c.print(d, func() { c.printDetails(&d) })
		},
	}
}

// serverStats is the JSON of stats.
type serverStats struct {
	Server daemon.ServerStatus `json:"server"`
	Disks  []daemon.DiskStatus `json:"disks"`
}

func (c *controller) statsCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "stats",
		Short: "Show what the server and its disks have done and what they take",
		Long: `Show what the server and its disks have done since they were opened, and what
they take of memory. The same numbers are at /metrics of the control socket (and
of the server's --metrics address) for Prometheus.`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var s serverStats
			if err := c.call(cmd.Context(), http.MethodGet, "/v1/server", nil, nil, &s.Server); err != nil {
				return err
			}
			if err := c.call(cmd.Context(), http.MethodGet, "/v1/disks", nil, nil, &s.Disks); err != nil {
				return err
			}
			return c.print(s, func() { c.printStats(&s) })
		},
	}
}

func (c *controller) flushCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "flush NAME",
		Short: "Make everything that was written durable",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd.Context(), http.MethodPost, "/v1/disk/flush", named(args[0]), nil, nil)
		},
	}
}

func (c *controller) checkCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "check NAME",
		Short: "Check the image of a disk while it is served",
		Long: `Check the image of a disk while it is served: requests wait until it is done.
Nothing is repaired; for that the image must not be served ('drover check -r').

Ends with 0 if nothing was found, 2 for errors and 3 for space that leaked, as
'drover check' does.`,
		Args: arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var r daemon.CheckReply
			if err := c.call(cmd.Context(), http.MethodPost, "/v1/disk/check", named(args[0]), nil, &r); err != nil {
				return err
			}
			if err := c.print(r, func() { c.printChecked(&r) }); err != nil {
				return err
			}
			return checkExit(checkReport(&r))
		},
	}
}

func (c *controller) reloadCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "reload",
		Short: "Have the server read certificates and its configuration again",
		Long: `Have the server read again what can change while it runs: TLS certificates and
revocation lists, secrets, and the log level. SIGHUP does the same.`,
		Args: arguments(),
		RunE: func(cmd *cobra.Command, _ []string) error {
			var r daemon.ReloadReply
			if err := c.call(cmd.Context(), http.MethodPost, "/v1/reload", nil, nil, &r); err != nil {
				return err
			}
			return c.print(r, func() {
				for _, change := range r.Changes {
					c.printf("%s\n", change)
				}
				if len(r.Changes) == 0 {
					c.printf("Nothing has changed.\n")
				}
			})
		},
	}
}

func (c *controller) logLevelCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "log-level [LEVEL]",
		Short: "Show how much the server logs, or change it",
		Long:  `Show how much the server logs, or change it to error, warn, info or debug.`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) > 1 {
				return usagef("Unexpected argument: %s", args[1])
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			method, in := http.MethodGet, any(nil)
			if len(args) == 1 {
				method, in = http.MethodPut, daemon.LogLevel{Level: args[0]}
			}
			var l daemon.LogLevel
			if err := c.call(cmd.Context(), method, "/v1/log-level", nil, in, &l); err != nil {
				return err
			}
			return c.print(l, func() { c.printf("%s\n", l.Level) })
		},
	}
}
