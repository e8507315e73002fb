package keybrake.e2e;

import java.nio.file.Path;
import java.util.HashMap;
import java.util.List;
import java.util.Map;

/** What Kestra's own command line brings in its application.yml, as far as the engine cannot do without, and ours. */
final class Settings {
    private Settings() {}

    static Map<String, Object> common(Path data, String gracePeriod) {
        Map<String, Object> settings = new HashMap<>();
        settings.put("kestra.server-type", "STANDALONE");
        settings.put("kestra.repository.type", "h2");
        settings.put("kestra.queue.type", "h2");
        // Commits are written at once. By default H2 writes them up to half a second later, and after a SIGKILL in that
        // time an index was sometimes broken (1 time in 8). `retry` opens the file again where the kill of an execution
        // interrupted a thread of Kestra's in the middle of a write, which closes it.
        settings.put("datasources.h2.url", "jdbc:h2:retry:" + data.resolve("database")
            + ";TIME ZONE=UTC;DB_CLOSE_DELAY=-1;DB_CLOSE_ON_EXIT=FALSE;WRITE_DELAY=0");
        settings.put("datasources.h2.username", "sa");
        settings.put("datasources.h2.password", "");
        settings.put("datasources.h2.driver-class-name", "org.h2.Driver");
        settings.put("kestra.storage.type", "local");
        settings.put("kestra.storage.local.base-path", data.resolve("storage").toString());
        settings.put("kestra.tasks.tmp-dir.path", data.resolve("tasks").toString());
        settings.put("kestra.variables.env-vars-prefix", "ENV_");
        // For inputs of type SECRET: what they are encrypted with in the database of this test.
        settings.put("kestra.encryption.secret-key", "a2V5YnJha2Uta2V5YnJha2Uta2V5YnJha2Uta2V5YnI=");
        settings.put("kestra.plugins.configurations", List.of(Map.of(
            "type", "io.kestra.plugin.scripts.runner.docker.Docker", "values", Map.of("volume-enabled", true))));
        settings.put("kestra.anonymous-usage-report.enabled", false);
        settings.put("kestra.server.service.purge.initial-delay", "1h");
        settings.put("kestra.server.service.purge.fixed-delay", "1h");
        settings.put("kestra.server.service.purge.retention", "30d");
        // A lost worker is noticed in 10 s, and its tasks are given out again at once.
        settings.put("kestra.server.worker-task-restart-strategy", "IMMEDIATELY");
        settings.put("kestra.server.termination-grace-period", gracePeriod);
        settings.put("kestra.server.liveness.enabled", true);
        settings.put("kestra.server.liveness.interval", "2s");
        settings.put("kestra.server.liveness.timeout", "10s");
        settings.put("kestra.server.liveness.initial-delay", "5s");
        settings.put("kestra.server.liveness.heartbeat-interval", "1s");
        return settings;
    }
}
