package cli

import (
	"net/http"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/droverproject/drover/block"
	"github.com/droverproject/drover/daemon"
)

func (c *controller) snapshotCommand() *cobra.Command {
	const path = "/v1/disk/snapshots"
	create := &cobra.Command{
		Use:   "create NAME SNAPSHOT",
		Short: "Keep the disk as it is now under a name",
		Long: `Keep the disk as it is now under a name, inside its image. Whatever was answered
to a client before is in it. Requests wait for a moment.`,
		Args: arguments("NAME", "SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var s daemon.SnapshotStatus
			if err := c.call(cmd.Context(), http.MethodPost, path, named(args[0]), daemon.NameRequest{Name: args[1]}, &s); err != nil {
				return err
			}
			return c.print(s, func() { c.printf("Snapshot %q (ID %s) created.\n", s.Name, s.ID) })
		},
	}
	list := &cobra.Command{
		Use:   "list NAME",
		Short: "List the snapshots of a disk",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []daemon.SnapshotStatus
			if err := c.call(cmd.Context(), http.MethodGet, path, named(args[0]), nil, &list); err != nil {
				return err
			}
			return c.print(list, func() { c.printSnapshotList(list) })
		},
	}
	remove := &cobra.Command{
		Use:   "delete NAME SNAPSHOT",
		Short: "Delete a snapshot, given by name or ID",
		Args:  arguments("NAME", "SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd.Context(), http.MethodDelete, path, named(args[0], "snapshot", args[1]), nil, nil)
		},
	}
	rename := &cobra.Command{
		Use:   "rename NAME SNAPSHOT NEW",
		Short: "Give a snapshot another name",
		Args:  arguments("NAME", "SNAPSHOT", "NEW"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd.Context(), http.MethodPatch, path, named(args[0], "snapshot", args[1]), daemon.NameRequest{Name: args[2]}, nil)
		},
	}
	apply := &cobra.Command{
		Use:   "apply NAME SNAPSHOT",
		Short: "Make the disk what it was when a snapshot was taken",
		Long: `Make the disk what it was when a snapshot was taken. What was written since is
lost, unless another snapshot keeps it. It is refused while clients use the disk.`,
		Args: arguments("NAME", "SNAPSHOT"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd.Context(), http.MethodPost, path+"/apply", named(args[0], "snapshot", args[1]), nil, nil)
		},
	}
	return group("snapshot", "Create, list, delete, rename or apply snapshots of a disk",
		"Work with the snapshots inside the image of a disk that is served.", create, list, remove, rename, apply)
}

func (c *controller) resizeCommand() *cobra.Command {
	var r daemon.ResizeRequest
	cmd := &cobra.Command{
		Use:   "resize [flags] NAME [+]SIZE",
		Short: "Make a disk larger, or smaller, while it is served",
		Long: `Give a disk another size while it is served, or one that is larger by so much
(+SIZE). What is added reads as zeroes.

SCSI initiators are told of the new size. NBD clients see it when they connect
again: the protocol has no way to tell them.`,
		Example: `  drover ctl resize disk0 +10G
  drover ctl resize --shrink "" 5G`,
		Args: arguments("NAME", "SIZE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			sign, n, err := parseChange(args[1])
			if err != nil {
				return err
			}
			old := int64(0)
			if sign != 0 {
				var d daemon.DiskDetails
				if err := c.call(cmd.Context(), http.MethodGet, "/v1/disk", named(args[0]), nil, &d); err != nil {
					return err
				}
				old = d.Size
			}
			if r.Size, err = newSize(old, sign, n); err != nil {
				return err
			}
			var reply daemon.ResizeReply
			if err := c.call(cmd.Context(), http.MethodPost, "/v1/disk/resize", named(args[0]), r, &reply); err != nil {
				return err
			}
			return c.print(reply, func() { c.printResized(&reply) })
		},
	}
	f := cmd.Flags()
	f.BoolVar(&r.Shrink, "shrink", false, "allow the disk to become smaller")
	f.StringVar(&r.Preallocation, "preallocation", "", "how the added part is allocated: off, metadata, falloc or full")
	return cmd
}

func (c *controller) bitmapCommand() *cobra.Command {
	const path = "/v1/disk/bitmaps"
	list := &cobra.Command{
		Use:   "list NAME",
		Short: "List the dirty bitmaps of a disk",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var list []daemon.BitmapStatus
			if err := c.call(cmd.Context(), http.MethodGet, path, named(args[0]), nil, &list); err != nil {
				return err
			}
			return c.print(list, func() { c.printBitmapList(list) })
		},
	}
	var granularity string
	var disabled bool
	add := &cobra.Command{
		Use:   "add NAME BITMAP",
		Short: "Add a dirty bitmap in which nothing is marked",
		Args:  arguments("NAME", "BITMAP"),
		RunE: func(cmd *cobra.Command, args []string) error {
			r := daemon.BitmapRequest{Name: args[1], Disabled: disabled}
			if granularity != "" {
				var err error
				if r.Granularity, err = parseSize("granularity", granularity); err != nil {
					return err
				}
			}
			return c.call(cmd.Context(), http.MethodPost, path, named(args[0]), r, nil)
		},
	}
	add.Flags().StringVarP(&granularity, "granularity", "g", "", "`size` that one bit stands for")
	add.Flags().BoolVar(&disabled, "disabled", false, "record nothing until it is enabled")
	commands := []*cobra.Command{list, add, {
		Use:   "remove NAME BITMAP",
		Short: "Remove a dirty bitmap",
		Args:  arguments("NAME", "BITMAP"),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.call(cmd.Context(), http.MethodDelete, path, named(args[0], "bitmap", args[1]), nil, nil)
		},
	}}
	for _, v := range [][2]string{
		{"enable", "Have a bitmap record what is written"}, {"disable", "Have a bitmap stay as it is"},
		{"clear", "Make nothing marked in a bitmap"},
	} {
		commands = append(commands, &cobra.Command{
			Use:   v[0] + " NAME BITMAP",
			Short: v[1],
			Args:  arguments("NAME", "BITMAP"),
			RunE: func(cmd *cobra.Command, args []string) error {
				return c.call(cmd.Context(), http.MethodPatch, path, named(args[0], "bitmap", args[1]), daemon.BitmapAction{Action: v[0]}, nil)
			},
		})
	}
	commands = append(commands, &cobra.Command{
		Use:   "merge NAME BITMAP SOURCE",
		Short: "Mark in a bitmap whatever another one of the disk has marked",
		Args:  arguments("NAME", "BITMAP", "SOURCE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			action := daemon.BitmapAction{Action: "merge", Source: args[2]}
			return c.call(cmd.Context(), http.MethodPatch, path, named(args[0], "bitmap", args[1]), action, nil)
		},
	})
	return group("bitmap", "List, add, remove and change dirty bitmaps of a disk",
		"Work with the persistent dirty bitmaps of a disk that is served.", commands...)
}

func (c *controller) exportCommand() *cobra.Command {
	var r daemon.ExportRequest
	var options []string
	add := &cobra.Command{
		Use:   "add [flags] NAME IMAGE",
		Short: "Serve another image under a name",
		Long: `Have 'drover serve' serve another image, under NAME. What the server was started
with holds for it too: which files an image may refer to, secrets, who may use it,
--read-only. A server in a sandbox opens nothing any more, and refuses.`,
		Example: `  drover ctl --socket /run/drover/vm1.ctl export add data /images/data.qcow2
  drover ctl export add --read-only --snapshot before old /images/data.qcow2`,
		Args: arguments("NAME", "IMAGE"),
		RunE: func(cmd *cobra.Command, args []string) error {
			var err error
			r.Name = args[0]
			if r.Image, err = absolute(args[1]); err != nil {
				return err
			}
			for _, text := range options {
				name, value, ok := strings.Cut(text, "=")
				if !ok || name == "" {
					return usagef("--option %s: expecting NAME=VALUE", text)
				}
				if r.Options == nil {
					r.Options = make(map[string]string)
				}
				r.Options[name] = value
			}
			return c.call(cmd.Context(), http.MethodPost, "/v1/exports", nil, r, nil)
		},
	}
	f := add.Flags()
	f.StringVarP(&r.Format, "format", "f", "", "`format` of the image")
	f.BoolVarP(&r.ReadOnly, "read-only", "r", false, "let clients change nothing")
	f.StringVarP(&r.Snapshot, "load-snapshot", "l", "", "serve `SNAPSHOT` instead of the disk, by ID or name, read-only")
	f.BoolVar(&r.HideSnapshots, "no-snapshots", false, "do not serve the snapshots inside the image")
	f.StringArrayVarP(&r.Bitmaps, "bitmap", "B", nil, "let clients read dirty bitmap `NAME` (may be repeated)")
	f.StringVarP(&r.Description, "description", "D", "", "`text` that clients can show")
	f.StringArrayVarP(&options, "option", "o", nil, "runtime option of the format: `NAME=VALUE` (may be repeated)")
	f.StringArrayVar(&r.Allow, "allow", nil, "instead of the server's own rules: `RULE` like uid:1000, gid:kvm, cn:alice, san:vm1.lan (may be repeated)")
	force := false
	remove := &cobra.Command{
		Use:   "remove NAME",
		Short: "Stop serving an image",
		Args:  arguments("NAME"),
		RunE: func(cmd *cobra.Command, args []string) error {
			q := named(args[0])
			if force {
				q.Set("force", "true")
			}
			return c.call(cmd.Context(), http.MethodDelete, "/v1/exports", q, nil, nil)
		},
	}
	remove.Flags().BoolVar(&force, "force", false, "disconnect the clients that use it, when what they have asked for is done")
	return group("export", "Add exports to a server, or remove them",
		"Change what a 'drover serve' serves. (The disks of 'drover tcmu' come and go with targetcli.)", add, remove)
}

// absolute makes a file name one that means the same in every folder.
func absolute(name string) (string, error) {
	_, rest, plain := block.SplitProtocol(name)
	if !plain {
		return name, nil
	}
	return filepath.Abs(rest)
}
